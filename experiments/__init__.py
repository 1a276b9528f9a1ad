"""Experiments: configs that are compared over several seeds, and their results in results/.

    run.py       the command: python -m experiments.run NAME (list | run | report)
    spec.py      what an experiment is
    store.py     the runs of an experiment, and the rows of those that are done
    training.py  trains what is missing
    tables.py    the columns of a row, and how they are printed
    charts.py    the kinds of figure
    publish.py   writes results/NAME
    measures.py  what experiments measure on a trained network

Every other file is an experiment.
"""
