"""Pictures of runs, drawn with matplotlib, which is imported only when one is drawn.

    figure = plot(state)
    figure.savefig("curves.png")

No function here changes the backend, the parameters or the figures of matplotlib.
"""
