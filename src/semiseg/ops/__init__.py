"""Pure tensor maths: tensors in, tensors out, and nothing in here waits for the device.

losses   totals and counts of the losses      ema      the averaged teacher
pseudo   labels from logits                   resize   logits and masks to another size
mix      CutMix                               metrics  confusion matrix, IoU
colour   the strong view
"""
