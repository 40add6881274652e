"""Photos in, training and validation samples out."""
