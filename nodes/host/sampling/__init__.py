"""One sampling call: runs, steps, the two kinds of pass, and what is said about them."""
