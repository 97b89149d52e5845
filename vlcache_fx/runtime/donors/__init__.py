"""Donors in and out of the store: found for a request, refined, admitted."""
