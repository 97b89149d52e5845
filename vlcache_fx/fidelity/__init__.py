"""How faithful reuse is: measured on traffic, and what follows from it."""
