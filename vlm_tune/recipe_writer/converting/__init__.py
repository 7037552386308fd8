"""Recipes from the configurations of other frameworks."""
