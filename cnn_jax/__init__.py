"""Convolutional image classifiers in JAX and Flax: a textbook chapter, as a research codebase.

THE CORE, in reading order. From `main` to the update of the parameters are five calls: `main.main`,
`tools.train.run`, `fit.fit`, `step.train_segment` and `step.train_step`.

    main.py         from the command line to the tool that it asks for
    configs.py      what is trained: the named configs
    config.py       the fields of a config, each with its documentation
    models/         the networks: build() in __init__.py, chapter.py
    augment.py      from pixels to what the network sees
    losses.py       the losses
    optim.py        optimizers, schedules, and freezing by pattern
    order.py        the order of the examples
    step.py         the training state, one update, and the compiled segment of updates
    fit.py          the loop: segments to the end, validation, checkpoints, resuming

Around it:

    recipes.py      configs for own photos, and newer recipes for CIFAR-10
    predictor.py    trained parameters and preprocessing: logits and activations of any images
    distort.py      changes of photos; mixing.py: erasing, mixup and CutMix
    muon.py         an optimizer for the kernels inside a network
    batches.py      the images of a segment: all, or streamed; hooks.py: functions of the user's own
    models/         resnet.py, airbench.py, efficientnet.py, head.py, initial values, whitening;
                    weights.py: those of PyTorch's libraries; inspection.py: outputs of named
                    modules, summaries, what is frozen
    layers.py       convolution, dense and pooling layers; kernels/ computes them, fast on a CPU
    mesh.py         one mesh of all devices; backend.py: what JAX reads once
    memory.py       what is free, cgroups.py: limits of containers, capacity.py: what training needs
    data/           load() in __init__.py: digits, tfds, photos, official archives; split, and held
                    in memory or streamed
    runs/           a run's folder: lock and config, checkpoints, log, summary, signals;
                    processes.py: runs of several processes
    pretrained.py   networks that start from trained parameters
    tools/          one file a --mode; onnx_writer.py: traced functions as ONNX files
    metrics.py, classifiers.py, saliency.py, drawing.py    what the tools compute and draw
    command.py, fields.py, values.py, upgrade.py, user_code.py    from text to a config
    trees.py, files.py, errors.py          parameters by name, atomic files, errors in one line
"""

__version__ = "0.2.0"
