"""Every vision-language family of the installed ``transformers``, in its smallest form, through the package."""
