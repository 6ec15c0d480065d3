"""Drafters: they guess the policy's next tokens; the engine verifies the guesses, so a drafter can cost time but never change a token."""
