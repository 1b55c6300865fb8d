"""Reading other people's files safely, and writing ours whole."""
