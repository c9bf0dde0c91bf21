"""What becomes of every family of timm and torchvision: does it quantize, train, pack, load and answer as it should?"""
