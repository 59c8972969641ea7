"""GenEval (arXiv 2310.11513): are the objects of a prompt in the image, in number, colour and place?"""
