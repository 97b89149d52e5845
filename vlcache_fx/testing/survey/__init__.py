"""Tries out the vision-language families of the installed ``transformers``, each as a tiny model."""
