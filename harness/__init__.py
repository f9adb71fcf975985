"""What every training script needs and no reader of an algorithm does: options, files, logs,
environments, replay and compiling. Nothing here knows a flow, a critic or a temperature.
"""
