# vLLM with the adamas attention backend for CPUs (x86-64). The build context is the folder that `make dist` fills:
#   docker build -f serving/deploy/cpu.Dockerfile -t vllm-adamas:cpu dist
#   docker run --ipc=host -e VLLM_CPU_KVCACHE_SPACE=GIB -p 8000:8000 vllm-adamas:cpu MODEL
FROM vllm/vllm-openai-cpu:v0.32.0-x86_64

COPY vllm_adamas-*.whl /tmp/dist/
# What the image has of the wheel's requirements stays as it is.
RUN python3 -m pip install --no-cache-dir /tmp/dist/*.whl \
    && useradd --create-home --uid 10001 adamas

# A number, so that Kubernetes can see that it is not root. Models are cached in /home/adamas/.cache/huggingface.
USER 10001
WORKDIR /home/adamas
ENV HOME=/home/adamas

EXPOSE 8000
HEALTHCHECK --interval=30s --timeout=10s --start-period=10m \
    CMD ["python3", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:8000/health', timeout=5)"]
ENTRYPOINT ["vllm", "serve", "--attention-backend", "adamas"]
