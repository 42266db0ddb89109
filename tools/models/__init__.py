"""The papers' models that timm does not have, registered with timm."""
