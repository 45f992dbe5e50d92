"""What a checkout runs on: which packages it declares."""
