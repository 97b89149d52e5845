"""What passes share: insertion of nodes, attention calls and masks. Passes import it."""
