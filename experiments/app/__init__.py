"""A page in the browser: one picture, one question, up to four selectors side by side."""
