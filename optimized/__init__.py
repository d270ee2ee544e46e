"""The production path: the ops of `arbitor.reference` on Triton, the trainer and the command line. Importing it touches no GPU."""
