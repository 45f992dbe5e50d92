"""What a checkout runs on: what it asks for, and the interpreter and packages that meet it."""
