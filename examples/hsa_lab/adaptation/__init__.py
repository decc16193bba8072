"""
Training of a converted model: what was converted keeps talking like its base and learns to use its memory.

    recipe.py       the model, what is trained, the losses and the stages, as JSON
    batches.py      rows of `hsa_lab.chat_rows` with what their losses need
    low_rank.py     low-rank changes of frozen matrices, merged or as an adapter of PEFT
    losses.py       losses of chosen tokens without the logits of all, and of retrieval
    student.py      the model with its losses, its teacher, its optimizers, compiled layer by layer
    run.py          a run that can be stopped and resumed
    chats.py        conversations sampled from the base
"""
