"""The executable specification: readable pure PyTorch for every ternary rule and the ARB graph."""
