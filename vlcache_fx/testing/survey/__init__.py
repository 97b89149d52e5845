"""The vision-language families of the installed ``transformers``, each in its smallest form, tried out."""
