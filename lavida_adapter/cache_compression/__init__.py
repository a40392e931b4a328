"""Selectors and packers that make the prefix cache smaller, one method a file."""
