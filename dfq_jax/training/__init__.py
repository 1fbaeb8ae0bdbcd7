"""Training without data: a student on its levels learns from its float teacher."""
