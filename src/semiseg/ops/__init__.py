"""Pure tensor maths: tensors in, tensors out, and nothing in here waits for the device.

losses     totals and counts of the losses    ema      the averaged teacher
pseudo     labels from logits                 resize   logits and masks to another size
mix        CutMix, ClassMix                   metrics  confusion matrix, IoU
partition  reliable by entropy                colour   the strong view
bank       a queue of features a class        norm     batch norm's statistics
contrast   anchors, negatives, their loss
"""
