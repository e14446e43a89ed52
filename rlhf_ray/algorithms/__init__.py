"""The field's mathematics on tensors. Flat ragged batches: [N] tokens of B sequences, `offsets` [B + 1], no padding."""
