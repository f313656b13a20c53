"""What is done for the kinds of other nodes' code; each is a row of docs/neighbours.md."""
