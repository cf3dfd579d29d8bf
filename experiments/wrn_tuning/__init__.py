"""Prior precisions tuned while a Wide ResNet trains, beside a sweep and a search of the weight decay."""
