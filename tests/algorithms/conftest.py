from hypothesis import settings

# Torch's first calls are slow, and so is a loaded machine: time says nothing about these functions.
settings.register_profile("timeless", deadline=None)
settings.load_profile("timeless")
