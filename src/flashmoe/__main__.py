from flashmoe.cli.main import main

main()
