"""Methods that train networks to explain: a surrogate for masked images, and an explainer."""
