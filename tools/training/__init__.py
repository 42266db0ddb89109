"""From a recipe to a trained model: build, train, evaluate, save and resume."""
