"""Methods that make the prefix cache smaller, one file each; their base classes are in `compressor`."""
