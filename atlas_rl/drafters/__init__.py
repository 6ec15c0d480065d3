"""Drafters guess the policy's next tokens. The engine verifies the guesses: a drafter can cost time, never change a token."""
