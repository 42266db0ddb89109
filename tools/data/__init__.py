"""Training data: small sets as arrays, folders of images through timm."""
