"""One sampling call: its state, what joins, the two kinds of pass, and what is said of them."""
