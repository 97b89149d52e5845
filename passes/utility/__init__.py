"""What passes share: nodes of attention calls and masks."""
