"""Workers of a run: in this process, on this machine, as jobs of a batch system, or on a running dask cluster.

1. :mod:`~stillframe.cluster.connect` starts or joins the workers that the settings ask for and yields an executor.
2. :mod:`~stillframe.cluster.executors` defines executors, the one of this process, and the rule for failed items.
3. :mod:`~stillframe.cluster.dask_executor` is the executor on a dask cluster.
4. :mod:`~stillframe.cluster.jobqueue` submits workers as jobs; :mod:`~stillframe.cluster.job_settings` reads which.
5. :mod:`~stillframe.cluster.security` makes TLS keys and private folders, so that no other user can take part.
6. :mod:`~stillframe.cluster.worker_check` refuses workers of other versions, or that lack the shared folders.
7. :mod:`~stillframe.cluster.worker_environment` holds the environment variables of worker processes.

May import: the ground modules, ``storage.durable`` and ``storage.checksums``. An executor applies any function to any
items; it never imports registration.
"""
