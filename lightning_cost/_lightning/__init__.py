"""What the library asks of Lightning: supported Trainers, processes, recorded batches, the progress bar."""
