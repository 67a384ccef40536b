"""Training the judge itself: LoRA on the log-odds of the service's own prompts, from a few hundred labels.

labels.py    rows -> Labels; duplicates, contradictions, split     leaks.py     labels that evaluation files know
prompts.py   a Label -> an Example: the service's own token ids     reader.py    token ids -> log-odds and label mass
packed.py    many prompts in one forward, shared prefixes once      loss.py      log-odds -> loss
trainable.py  a model, and what of it is trained                    training.py  the loop, its checkpoints and its log
readings.py  what a judge says of labels held out                   evidence.py  before against after
calibrating.py  how far its probabilities can be trusted, and what makes them better
run.py       what decides a run; the labels that it can use         settings.py  every setting
memory.py    what a training will need                              lora.py      LoRA layers with less memory traffic
"""
