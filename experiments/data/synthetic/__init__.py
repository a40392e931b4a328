"""Pictures drawn on the fly, with known answers and known places; one generator a package."""
