# The image of Dataflow's workers for `prepare --engine=beam`, see docs/how-to/engines.md. Python and Beam are of the
# versions of the environment that starts the pipeline.
#
#   docker build -f launch/beam.Dockerfile -t IMAGE .
ARG PYTHON=3.11
ARG BEAM=2.77.0
FROM apache/beam_python${PYTHON}_sdk:${BEAM}
WORKDIR /flax_mlm
COPY launch ./launch
RUN pip install --no-cache-dir -r launch/beam-requirements.txt -r launch/gcs-requirements.txt
COPY pyproject.toml README.md LICENSE requirements.txt ./
COPY configs ./configs
COPY flax_mlm ./flax_mlm
# Without requirements.txt: jax and TensorFlow are for training.
RUN pip install --no-cache-dir --no-deps .
