"""What `jaxbp run` needs: config, data, training loop, metrics, plots; it takes the packages of jaxbp[run].

import jaxbp.run
model = jaxbp.run.load("runs/digits")
output = model.predict(x)
"""

from jaxbp.run.store.model import Model, load

__all__ = ["Model", "load"]
