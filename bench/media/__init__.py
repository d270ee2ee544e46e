"""The demonstration of media: rendered files, random frozen encoders, and what a tiny model learns of them."""
