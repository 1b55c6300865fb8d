"""How good a model is, and teaching it a task."""
