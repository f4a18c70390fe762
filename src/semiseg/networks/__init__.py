"""Networks: an encoder of timm and a decoder of segmentation_models_pytorch, in three parts that a method may call."""
