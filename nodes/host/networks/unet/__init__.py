"""UNets: convolutions with transformers between them."""
