"""A study: jobs that share a folder, one result each, and the table made of them."""
