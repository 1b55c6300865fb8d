"""What the training loop needs: flags, batches, losses, the folder of a run, the processes that train together."""
