"""The world of shapes and its teachers: small enough to train the whole method on two cores."""
