"""What a mount shows of the model: directories, files and their attributes. Still no I/O."""
