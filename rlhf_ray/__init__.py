"""Reinforcement learning from human and AI feedback on Ray."""
